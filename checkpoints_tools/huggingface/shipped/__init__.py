"""Files that are shipped next to exported weights, for `transformers` with `trust_remote_code`.

They are self-contained: they import nothing of mmscale, and each other only relatively, as Hugging Face's dynamic
modules require.
"""
