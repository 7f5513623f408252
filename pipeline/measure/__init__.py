"""What a run is measured by: perplexity, tasks, sources of loss, outliers; reports and comparisons."""
