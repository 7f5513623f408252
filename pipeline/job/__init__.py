"""What a run begins with: checks and notices, text, what it is identified by, what ranks share."""
