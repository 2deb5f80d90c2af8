"""What a run, an audit or a plan looks like: pages, charts, tables, definitions.

html            report.html and report.json from run directories
html_template   one self-contained page: template, content policy, text that cannot run
metric_charts   which charts a report has; svg_chart draws them
glossary        what every metric means; docs/metrics.md is written from it
terminal        tables and progress lines that fit any width
diagnostics     findings read from metrics: budget, over-optimisation, KL by position

Reads files through kleash.storage alone; imports no model and nothing of kleash.training.
Start reading at html.write_report.
"""
