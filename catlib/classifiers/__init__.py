"""Everything that turns photos into one score per breed, behind one interface."""
