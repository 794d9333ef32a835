"""The commands that bnlayer itself brings; others arrive by the entry-point group `bnlayer.commands`."""
