"""What the operating system gives: files, memory, terminals and this installation."""
