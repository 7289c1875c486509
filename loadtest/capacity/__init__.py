"""How many of what serve a load: measured costs, closed forms and a simulation of a cluster. No sockets, no clock."""
