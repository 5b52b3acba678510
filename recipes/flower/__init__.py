"""A federation on Flower: an app, and a script that runs it on this machine as it would run on several."""
