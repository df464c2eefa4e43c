"""How good a run is: one folder per question."""
