"""Reports on runs: figures and one HTML page. Reads run folders and never touches a model."""
