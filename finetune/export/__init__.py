"""Models that others open: saved, compared, merged, in other forms."""
