"""Passages that several tests read: four in English, one in German."""

SHIPPING = (
    "Parcels to Norway leave the warehouse on weekdays and arrive after three to five working days. The sender pays "
    "the customs duty in advance, and a parcel above thirty kilograms travels by road freight instead of by air."
)
WARRANTY = (
    "The warranty covers faults of material for two years from the date of purchase. Damage by water, by falls or by "
    "repairs of one's own is not covered, and the battery has a warranty of six months only."
)
PASSWORD = (
    "An administrator can reset the password of a member in the settings under security. The member gets a link by "
    "mail that is valid for one hour, and old sessions are closed as soon as the new password is set."
)
GERMAN = (
    "Pakete nach Norwegen verlassen das Lager an Werktagen und kommen nach drei bis fünf Arbeitstagen an. Der Absender "
    "bezahlt den Zoll im Voraus, und schwere Pakete reisen auf der Straße statt mit dem Flugzeug."
)
TEXT = "Adapters are small. They hold two low rank matrices! Do they need a base? Yes they do."
