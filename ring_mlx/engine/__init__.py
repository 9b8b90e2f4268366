"""Conversations with a loaded model on a thread, and the snapshots that they reuse."""
