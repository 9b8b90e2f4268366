"""The screens; the chat itself is one class in five files, each a layer on the one before."""
