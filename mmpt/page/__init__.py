"""What pages are made of: HTML elements, and parts that stand in the file itself."""
