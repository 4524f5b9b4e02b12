"""`distft export`: a run's result for other programs, and the proof that it answers as in training."""
