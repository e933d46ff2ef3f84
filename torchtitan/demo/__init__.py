"""A page in the browser for speech continuations, and the server behind it."""
