"""Run folders, streams in files, reading ahead."""
