"""The stages that the trainer can be given: which there are (table.py), and what each one brings (main.py, ...)."""
