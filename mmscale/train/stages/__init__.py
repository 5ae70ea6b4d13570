"""The stages of training: the table of stages (table.py), and what each stage provides (main.py, ...)."""
