"""Training by MMEngine's Runner: stops, resumes and checkpoints bit for bit."""

from asr_downstream.detection.extra import load

load()
