"""`headcast view`: a page in the browser that shows an avatar from all sides and lets it be driven.

`scene` says what is to be seen, `picture` makes it, `page` has the controls and the loop, `guard` the server.
"""
