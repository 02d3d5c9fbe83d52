"""Training by MMEngine's Runner: stops, resumes and checkpoints bit for bit."""
