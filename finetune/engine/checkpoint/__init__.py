"""Write checkpoints atomically, find only complete ones, and resume from them bit for bit."""
