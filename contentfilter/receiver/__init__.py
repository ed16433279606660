"""The receiver process: takes over connections of users who are not trusted, and offers their mail to the workers."""
