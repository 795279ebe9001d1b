"""Reading breeds off answers as models give them: the right breed each, or honestly None."""

import json

import pytest
from PIL import Image

from catlib.breeds import BREEDS
from catlib.data.names import restrict
from catlib.errors import InputError
from catlib.parsing import BreedParser
from catlib.settings import DataSettings, TrainSettings
from catlib.training.run import TrainingData

ALL = BreedParser([breed.name for breed in BREEDS])
SPHYNX, HEMINGWAY = "Sphynx - Hairless Cat", "Extra-Toes Cat - Hemingway Polydactyl"

ANSWERS = [
    # the name alone, and how models set it
    ("Siamese", "Siamese"),
    ("RAGDOLL", "Ragdoll"),
    ("norwegian_forest_cat", "Norwegian Forest Cat"),
    ("MaineCoon", "Maine Coon"),
    ("**Maine Coon**", "Maine Coon"),
    ("**Breed:** Bengal", "Bengal"),
    ('"Korat."', "Korat"),
    ('{"breed": "Bengal", "confidence": 0.93}', "Bengal"),
    ("<answer>Birman</answer>", "Birman"),
    ("Answer: Turkish Van", "Turkish Van"),
    ("Siamese (95% sure)", "Siamese"),
    ("Breed: Sphynx (hairless cat)", SPHYNX),
    ("Sphynx - Hairless Cat", SPHYNX),
    ("Extra-Toes Cat (Hemingway Polydactyl)", HEMINGWAY),
    ("S\u200biamese", "Siamese"),
    ("Ｓｉａｍｅｓｅ", "Siamese"),
    ("Sphýnx", SPHYNX),
    ("", None),
    ("?", None),
    ("🐈️", None),
    # sentences
    ("The cat in the image is a Siamese breed.", "Siamese"),
    ("The cat in this photo appears to be a Russian Blue.", "Russian Blue"),
    ("Based on its folded ears, this is most likely a Scottish Fold cat.", "Scottish Fold"),
    ("This looks like a MaineCoon to me.", "Maine Coon"),
    ("I cannot be certain from one photo, but it looks like a Siamese.", "Siamese"),
    ("The cat's breed is likely Bengal (Prionailurus bengalensis × Felis catus).", "Bengal"),
    ("It has the typical look of a Birman: white gloves and blue eyes.", "Birman"),
    ("The Siamese's eyes are blue.", "Siamese"),
    ("The pointed coat is as seen in Siamese cats.", "Siamese"),
    ("The cat is an Ocicat. The breed was developed from Abyssinian, Siamese and American Shorthair.", "Ocicat"),
    ("This is a Balinese, which is closely related to the Siamese.", "Balinese"),
    ("A Birman, often confused with the Ragdoll.", "Birman"),
    ("It is a Cymric, a long-haired variety of the Manx.", "Cymric"),
    ("It looks similar to a Bengal.", "Bengal"),
    ("It's a Manx. Longhair cats look different.", "Manx"),
    ("It is a Longhair Manx.", "Cymric"),
    ("It could be a Siamese or a Balinese.", None),
    ("Siamese/Balinese", None),
    ("1. Siamese\n2. Balinese", None),
    ("Devon or Cornish Rex", None),
    ("American or British Shorthair", None),
    ("Turkish Angora or Van", None),
    ("It's a Norwegian Forest or Siberian cat.", None),
    ("I believe this is a Maine Coon, although it could also be a Norwegian Forest Cat.", None),
    ('["Bengal", "Ocicat"]', None),
    ("A cross between a Siamese and a Persian.", None),
    ("I can't tell the breed from this photo.", None),
    ("The image shows a fluffy cat on a windowsill.", None),
    ("This is a mixed-breed cat.", None),
    # number, spelling
    ("They are Tabbies.", "Tabby"),
    ("These are two Bengals!", "Bengal"),
    ("Two Sphynxes on a bed", SPHYNX),
    ("The Calicoes are sleeping.", "Calico"),
    ("American Short-haired cat", "American Shorthair"),
    ("an American short haired cat", "American Shorthair"),
    ("It is a domestic short-hair.", "Domestic Short Hair"),
    ("Domestic Longhaired cat", "Domestic Long Hair"),
    ("domestic medium hairs", "Domestic Medium Hair"),
    ("An American wire-haired cat", "American Wirehair"),
    ("Oriental Longhair", "Oriental Long Hair"),
    ("The Persian has long hair.", "Persian"),
    ("Pixie-Bob", "Pixiebob"),
    ("Bengalese", None),
    ("a Siameselike creature", None),
    # codes: the whole answer, or capitals
    ("MAN", "Manx"),
    ("him", "Himalayan"),
    ("dsh", "Domestic Short Hair"),
    ("This is a DSH.", "Domestic Short Hair"),
    ("Breed code: MCO", "Maine Coon"),
    ("A man with a cat on a sofa.", None),
    ("A MAN WITH A CAT ON A SOFA.", None),
    ("The cat is looking at him.", None),
    ("Him. He is cute.", None),
    ("It is a man.", None),
    ("A man holding a Bengal cat.", "Bengal"),
    ("Ben, the cat, sits on a rag.", None),
    ("One cat per photo, no sin in that.", None),
    ("The cat weighs a ton.", None),
    # everyday words: beside "cat" or "breed", or the whole answer
    ("Silver", "Silver"),
    ("Silver. The coat shines.", "Silver"),
    ("A silver cat.", "Silver"),
    ("The breed is Silver.", "Silver"),
    ("The cat lies on a silver car.", None),
    ("The cat is silver.", None),
    ("Tuxedo", "Tuxedo"),
    ("It's a Tuxedo.", "Tuxedo"),
    ("A tuxedo cat.", "Tuxedo"),
    ("The cat in the image is a tuxedo.", "Tuxedo"),
    ("A cat beside a man in a tuxedo.", None),
    ("A black and white photo of a cat.", None),
    ("A black and white cat.", "Tuxedo"),
    ("Tiger", "Tiger"),
    ("The cat plays with a toy tiger.", None),
    ("This is a tiger cat.", "Tiger"),
    ("The cats curl up on the sofa.", None),
    ("American Curl", "American Curl"),
    ("The breed of this cat is Exotic.", "Exotic Shorthair"),
    ("An exotic cat", "Exotic Shorthair"),
    ("It has an exotic look.", None),
    ("The cat sits on an oriental carpet.", None),
    ("This cat is an Oriental.", "Oriental Short Hair"),
    ("A hairless cat with large ears", SPHYNX),
    ("The belly is hairless.", None),
    ("A fold in the blanket hides the cat.", None),
    ("The photo was taken in York.", None),
    ("The cat eats Thai food.", None),
    ("Devon Rex", "Devon Rex"),
    ("A cat in Havana.", None),
    ("Havana", "Havana"),
    ("The cat lies on a Persian rug.", None),
    ("A Bengal tiger.", None),
    ("A Siberian husky next to a cat.", None),
    ("A Persian cat on a Persian rug.", "Persian"),
    # negations and contrasts
    ("I'm not sure. Ragdoll?", "Ragdoll"),
    ("I'm not sure, maybe a Ragdoll.", "Ragdoll"),
    ("Not sure which breed but possibly Ragdoll", "Ragdoll"),
    ("No doubt: a Bengal.", "Bengal"),
    ("No doubt this is a Bengal.", "Bengal"),
    ("Without a doubt a Bengal", "Bengal"),
    ("There is no question that it's a Manx.", "Manx"),
    ("There's no mistaking this Sphynx.", SPHYNX),
    ("None other than a Maine Coon.", "Maine Coon"),
    ("It can't be anything but a Persian.", "Persian"),
    ("This cat has no tail and is a Manx.", "Manx"),
    ("This cat has no tail, so it's a Manx.", "Manx"),
    ("The cat with no fur is a Sphynx.", SPHYNX),
    ("No specific breed, a domestic shorthair.", "Domestic Short Hair"),
    ("This is not a purebred cat but a moggy.", "Domestic Short Hair"),
    ("No, it is a Bengal.", "Bengal"),
    ("The ears do not fold, therefore a British Shorthair.", "British Shorthair"),
    ("This is not a Siamese but a Balinese.", "Balinese"),
    ("It isn't a Siamese, it's a Balinese.", "Balinese"),
    ("It is not a Siamese.", None),
    ("It isn’t really a Siamese.", None),
    ("I don't think that this cat is a Siamese.", None),
    ("It is not, in my opinion, a Siamese.", None),
    ("It does not look like a purebred Siamese.", None),
    ("This cannot be a Persian.", None),
    ("Not a Siamese, Balinese or Himalayan.", None),
    ("Neither a Siamese nor a Persian, but a Himalayan.", "Himalayan"),
    ("Rather a Ragdoll than a Birman.", "Ragdoll"),
    ("A Bengal rather than an Ocicat or a Chausie.", "Bengal"),
    ("More like a Somali than an Abyssinian", "Somali"),
    ("Unlike the Siamese, this is a Tonkinese.", "Tonkinese"),
    ("Birman, not to be confused with a Ragdoll", "Birman"),
    ("Korat instead of Russian Blue", "Korat"),
    ("Siamese? No, a Balinese.", "Balinese"),
    ("A Siamese? Definitely not.", None),
    ("Siamese?\nNo.", None),
    ("Probably a Persian? It has a flat face.", "Persian"),
    ("It may not be a purebred, but it looks like a Ragdoll.", "Ragdoll"),
    ("The cat does not have the flat face of a Persian, so it is more likely a Ragdoll.", "Ragdoll"),
    ("While it resembles a Russian Blue, the cat is actually a Chartreux.", "Chartreux"),
    ("Siamese, not Balinese or Birman", "Siamese"),
    ("Cornish Rex (not Devon Rex)", "Cornish Rex"),
    ("This isn't just a cat, it's a Maine Coon!", "Maine Coon"),
    ("I am not entirely certain that this is a Ragdoll.", None),
    ("There is no cat in this photo, only a Persian rug.", None),
    ("A solid black cat, no Bombay though.", None),
    ("Anything but a Persian.", None),
    ("A non-Siamese cat.", None),
    # colours yield to pedigree names
    ("a silver British Shorthair", "British Shorthair"),
    ("a grey tabby Maine Coon", "Maine Coon"),
    ("A silver tabby American Shorthair cat.", "American Shorthair"),
    ("a calico Persian", "Persian"),
    ("A tortoiseshell-and-white Cornish Rex", "Cornish Rex"),
    ("A tabby cat, probably a Maine Coon.", "Maine Coon"),
    ("a domestic shorthair with tabby markings", "Domestic Short Hair"),
    ("This appears to be a domestic shorthair cat with a tabby coat pattern.", "Domestic Short Hair"),
    ("Domestic Shorthair (tabby)", "Domestic Short Hair"),
    ("Domestic Short Hair tabby", "Domestic Short Hair"),
    ("The cat has a tuxedo pattern. It is a Domestic Medium Hair.", "Domestic Medium Hair"),
    ("Tabby is not a breed but a coat; domestic shorthair.", "Domestic Short Hair"),
    ("A Siamese or a tabby", None),
    ("Siamese, Tabby", None),
    ("A tabby, a Siamese.", None),
    ("A Maine Coon and a tabby.", None),
    ("A tabby, not a Bengal.", "Tabby"),
    ("A silver tabby cat", "Tabby"),
    ("An orange tabby with a striped coat.", "Tabby"),
    ("a Dilute Calico", "Dilute Calico"),
    ("a silver chinchilla Persian", "Chinchilla"),
    ("Oriental Tabby", "Oriental Tabby"),
    ("A York Chocolate cat", "York Chocolate"),
    # mistaken for, ruled out, a part of another breed's; options
    ("While many people mistake it for a Bengal, this cat is an Ocicat.", "Ocicat"),
    ("People often confuse it with the Ragdoll; it is a Birman.", "Birman"),
    ("Breed: Siamese. Mistaken for Balinese often.", "Siamese"),
    ("Its eyes rule out a Siamese. Snowshoe.", "Snowshoe"),
    ("It has the face of a Persian, yet I believe it is an Exotic Shorthair.", "Exotic Shorthair"),
    ("The cat has the pointed coat of a Siamese but the body of a Snowshoe. I'd say Snowshoe.", "Snowshoe"),
    ("I believe the cat is a Himalayan. It has the body of a Persian and the points of a Siamese.", "Himalayan"),
    ("The coat of the cat is that of a Bengal.", "Bengal"),
    ("Judging by the face of the cat, a Persian.", "Persian"),
    ("the look of a Chausie", "Chausie"),
    ("A: Birman\nB: Ragdoll\nAnswer: B", None),
    ("Option B: Ragamuffin", "Ragamuffin"),
    ("1. Persian", "Persian"),
    ("Birman (also known as the Sacred Cat of Burma)", "Birman"),
    ("The cat is a cross between a Siamese and a Persian.", None),
    ("A Munchkin, because its legs are as short as a Dachshund's.", "Munchkin"),
    ("Devon Rex? No, Cornish Rex.", "Cornish Rex"),
    ("Sphynx cats have no hair, so this is a Sphynx.", SPHYNX),
    ("This cat, unlike the Siamese in your earlier photo, is a Nebelung.", "Nebelung"),
    ("The cat was bred from Burmese and Chinchilla: a Burmilla.", "Burmilla"),
    ("The breed cannot be a Bombay since its eyes are blue. Rather, it's a Snowshoe.", "Snowshoe"),
    ("Dies ist eine Maine-Coon-Katze", "Maine Coon"),
    ("The cat wears a tuxedo.", None),
    ("This cat is not purebred, but looks like a Siamese.", "Siamese"),
    ("No. It is a Sphynx.", SPHYNX),
    ("Ragamuffin, formerly called Ragdoll", None),
    ("Neither a Manx nor a Cymric: a Japanese Bobtail.", "Japanese Bobtail"),
    ("Could be a Somali, or perhaps an Abyssinian.", None),
    ("It's a Manx, and not a Cymric, given the short coat.", "Manx"),
    ("It looks more like a Tonkinese than a Burmese.", "Tonkinese"),
]


def test_the_table_is_large_and_says_nothing_twice():
    assert len(ANSWERS) >= 120 and len({answer for answer, _ in ANSWERS}) == len(ANSWERS)


@pytest.mark.parametrize(("answer", "breed"), ANSWERS)
def test_answers_of_the_67(answer, breed):
    assert ALL.parse(answer) == breed


@pytest.mark.parametrize(
    ("names", "answer", "breed"),
    [
        (["Сиамская", "Мейн-кун"], "Это мейн-кун.", "Мейн-кун"),
        (["Сиамская", "Мейн-кун"], "СИАМСКАЯ", "Сиамская"),
        (["Сиамская", "Мейн-кун"], "", None),
        (["Сиамская", "Мейн-кун"], "Кошка", None),
        (["Περσική", "Σιάμ"], "Η γάτα είναι ΠΕΡΣΙΚΗ.", "Περσική"),
        (["緬因貓", "波斯貓"], "照片中的貓是緬因貓。", "緬因貓"),
        (["緬因貓", "波斯貓"], "緬因貓或波斯貓", None),
        (["ペルシャ", "ベンガル"], "この猫はﾍﾞﾝｶﾞﾙです。", "ベンガル"),
        (["페르시안", "뱅갈"], "이 고양이는 페르시안입니다.", "페르시안"),
        (["เปอร์เซีย", "วิเชียรมาศ"], "แมวตัวนี้คือเปอร์เซีย", "เปอร์เซีย"),
        (["बंगाल", "फ़ारसी"], "यह बंगाल बिल्ली है।", "बंगाल"),
        (["बिल्ली", "बल्ला"], "बल्ला", "बल्ला"),
        (["الفارسي", "السيامي"], "هذا القط السيامي.", "السيامي"),
        (["Europäisch Kurzhaar", "Perser"], "Das ist eine Europa\u0308isch-Kurzhaar.", "Europäisch Kurzhaar"),
        (["Europäisch Kurzhaar", "Perser"], "europaisch kurzhaar", "Europäisch Kurzhaar"),
        (["Straße", "Gasse"], "STRASSE", "Straße"),
        (["Abyssin", "Persan"], "C'est l'abyssin d'un ami.", "Abyssin"),
        (["St. Gertrude", "Manx"], "It is a St. Gertrude.", "St. Gertrude"),
        (["St. Gertrude", "Manx"], "It is a St Gertrude.", "St. Gertrude"),
        (["Toyger", "Lykoi"], "a silver Toyger", "Toyger"),
    ],
)
def test_names_in_any_script(names, answer, breed):
    assert BreedParser(names).parse(answer) == breed


@pytest.mark.parametrize(
    ("names", "answer", "breed"),
    [
        (["Oriental Short Hair", "Siamese"], "Oriental Tabby", None),
        (["Oriental Short Hair", "Siamese"], "It is an Oriental Tabby cat.", None),
        (["Calico", "Siamese"], "a Dilute Calico", None),
        (["Siamese", "Birman"], "An Applehead Siamese", None),
        (["Siamese", "Birman"], "A Long-haired Siamese.", None),
        (["Silver", "Tabby"], "a silver tabby British Shorthair cat", None),
        (["Siamese", "Birman"], "Siamese or Balinese", None),
        (["Siamese", "Bengal"], "A Bengal, not an Ocicat", "Bengal"),
        (["Siamese", "Bengal"], "A tabby cat and a Bengal", "Bengal"),
        (["Sphynx", "Manx"], "A Canadian Sphynx", None),
        (["Sphynx", "Manx"], "A hairless cat", "Sphynx"),
        (["MAN", "SIA"], "A man and a Siamese.", "SIA"),
    ],
)
def test_names_of_the_67_that_are_not_among_the_candidates_use_up_their_words(names, answer, breed):
    assert BreedParser(names).parse(answer) == breed


@pytest.mark.parametrize("breed", BREEDS, ids=lambda breed: breed.name)
def test_every_name_is_read_in_a_sentence_about_the_breed(breed):
    for name in (breed.name, *breed.aliases):
        assert ALL.parse(f"The breed of this cat is {name}.") == breed.name
        assert ALL.parse(name.lower()) == breed.name


@pytest.mark.parametrize(
    "pair", [("Manx", "manx"), ("Foo-Bar", "Foo Bar"), ("Persian Short Hair", "Persian Shorthaired")]
)
def test_two_breeds_with_one_key_are_refused(pair):
    with pytest.raises(InputError, match=f"{pair[0]!r} and {pair[1]!r}"):
        BreedParser(pair)


def test_a_name_without_a_letter_is_refused():
    with pytest.raises(InputError, match="no letter"):
        BreedParser(["???", "Manx"])


def test_two_breeds_with_one_key_are_refused_before_photos_are_judged():
    with pytest.raises(InputError, match="rename one"):
        restrict(["Foo Bar", "Foo-Bar", "Manx"], DataSettings())
    assert restrict(["Foo Bar", "Foo-Bar", "Manx"], DataSettings(breeds="Foo Bar,Manx")) == {"Foo Bar", "Manx"}


def test_two_breeds_with_one_key_are_refused_before_a_training_loads_its_model(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "vlm").mkdir()
    for part, breeds in (("train", ["Foo Bar", "Foo-Bar"]), ("val", ["Foo Bar"])):
        turns = [[{"from": "human", "value": "<image>\nBreed?"}, {"from": "gpt", "value": breed}] for breed in breeds]
        rows = [
            {"id": f"{part}{i}", "image": "a.png", "conversations": turn, "metadata": {"breed": breed, "split": part}}
            for i, (turn, breed) in enumerate(zip(turns, breeds, strict=True))
        ]
        (tmp_path / "vlm" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = TrainSettings(train_data=str(tmp_path / "vlm/train.jsonl"), val_data=str(tmp_path / "vlm/val.jsonl"))
    with pytest.raises(InputError, match="rename one"):
        TrainingData(settings)


def test_long_answers_take_no_longer_a_word():
    assert ALL.parse("very " * 3000 + "Siamese") == "Siamese"
    assert ALL.parse("not a Siamese, " * 1000 + "a Manx") == "Manx"
    assert ALL.parse("a tabby, a Siamese and " * 500) is None
