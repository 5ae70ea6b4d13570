"""Files that are shipped beside exported weights, as `transformers` loads them with `trust_remote_code`.

They stand alone: they import nothing of mmscale, and each other only relatively, as Hugging Face's dynamic modules ask.
"""
