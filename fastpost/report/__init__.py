"""`fastpost report RUN`: a run as one page of HTML that needs nothing but a browser."""
