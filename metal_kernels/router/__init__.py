"""Router: chooses experts for each token."""
