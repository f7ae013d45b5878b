"""`certjax bench`: what a certificate costs and saves on this machine."""
