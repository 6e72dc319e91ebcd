"""The frozen model: its weights, how they are stored, what is refused; no adapters here."""
