"""Linear gate: grouped RMSNorm of the attention output times a sigmoid gate."""
