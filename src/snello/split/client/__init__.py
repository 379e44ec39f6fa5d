"""The client of split learning.

join.py        `snello join`
place.py       the client's half in training
link.py        the way from there to the server
connection.py  a frame there, one back, whatever happens in between
endpoints.py   where the server is and how to show who we are
waiting.py     coroutines from code that is not asynchronous
model.py       a finished run in use
"""
