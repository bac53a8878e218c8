"""The same sums in fewer operations and less memory."""
