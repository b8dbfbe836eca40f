"""The models of other libraries: names, shapes and configurations, both ways."""
