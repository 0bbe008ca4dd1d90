"""fastpost inside other people's trainers: the one place where another library is patched, when asked, reversibly."""
