"""Who may take part, and what is wrong where they cannot.

auth.py    tokens, certificates, tickets
certs.py   `snello certs`: making a CA, certificates and tokens
tls.py     reading and checking them
doctor.py  `snello doctor`
"""
