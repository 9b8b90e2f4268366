"""The screens. The chat itself: `view` shows it, `turn_commands` and `chat` carry out its commands."""
