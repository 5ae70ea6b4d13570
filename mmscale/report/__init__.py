"""Reports on runs: figures and one HTML page. Reads run folders and never loads a model."""
