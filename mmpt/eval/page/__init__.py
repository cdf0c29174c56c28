"""The pieces of report.html: parts, charts, tables and judgements as HTML."""
