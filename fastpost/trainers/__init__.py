"""The verbs: one readable loop a method, and the few functions that they share. Importing this imports none of them."""
