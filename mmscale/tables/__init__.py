"""Tables of everything that is chosen by name. No torch, and no configuration: the command line reads them at once."""
