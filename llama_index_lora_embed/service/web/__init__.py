"""The web page at `/`: jobs, adapters with their reports, queries side by side, and labelling; made by the server."""
