"""What runs leave for people and scripts: run.json, summary.csv and report.html."""
