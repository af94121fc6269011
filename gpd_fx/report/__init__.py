"""What an expansion did, for people: text, Markdown and pictures."""
