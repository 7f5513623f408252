"""What is printed: progress, tables, sizes and times as people read them."""
