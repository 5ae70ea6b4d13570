"""Reports on runs: charts and tables on one HTML page. Reads run folders and never loads a model."""
