"""What is made of trained policies: evaluation, statistics, plots, videos, exported files."""
