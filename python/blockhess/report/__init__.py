"""Tables, records, plots and HTML pages of results."""
