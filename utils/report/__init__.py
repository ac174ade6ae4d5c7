"""The report: one HTML page about evaluations. runs (read), breakdown (compute), media, curves (draw), page (write)."""
