"""Tables of everything that is chosen by name.

They need neither torch nor a configuration: the command line reads them.
"""
