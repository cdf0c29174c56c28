"""The pieces of report.html: charts, tables and judgements as HTML."""
