"Public sets: every reader on a tiny tree in its publisher's form, leaks refused or counted, damaged and hostile files refused by name."
import json
import struct
import subprocess
import sys
import zlib

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset

from hkust_demos import cli
from hkust_demos.catalog import METHODS
from hkust_demos.data.collections import COLLECTIONS, VARIABLE, CollectionMissing, find_collection, missing_sentence, open_collection
from hkust_demos.data.examples import CollectionError, LeakError, decode_all, describe, open_picture


def picture(path, shade=0, size=(12, 10), mode="RGB"):
    "A small picture at a path."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, (shade,) * 3 if mode == "RGB" else shade).save(path)


def text(path, *lines):
    "A text file at a path."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def dicom(path, patient, value=40):
    "A CT slice of one value with a patient in its header."
    path.parent.mkdir(parents=True, exist_ok=True)
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = pydicom.uid.generate_uid()
    data.SeriesInstanceUID, data.Modality, data.PatientID, data.InstanceNumber = "1.2.3", "CT", patient, 1
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 8, 8, 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.RescaleSlope, data.RescaleIntercept, data.PixelSpacing = 1, 0, [1, 1]
    data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    ramp = np.full((8, 8), value, np.int16)
    ramp[0, 0] = 0
    data.PixelData = ramp.tobytes()
    data.save_as(path, enforce_file_format=True)


def volume(path, values):
    "A NIfTI file at a path."
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([1.0, 1.0, 5.0, 1.0])), path)


def organ_case(scan, label, number):
    "A CT with soft tissue in one corner, and its label."
    body, mask = np.full((8, 6, 3), -900, np.int16), np.zeros((8, 6, 3), np.uint8)
    body[1:4, 1:3], mask[1:4, 1:3] = 60, number
    volume(scan, body)
    volume(label, mask)


def ham(root, form="copy", with_split=True):
    "HAM10000: four pictures, three lesions."
    rows = [("ISIC_0000001", "HAM_1", "mel"), ("ISIC_0000002", "HAM_1", "mel"), ("ISIC_0000003", "HAM_2", "nv"), ("ISIC_0000004", "HAM_3", "akiec")]
    for number, (image, _, _) in enumerate(rows):
        place = root / "images" if form == "copy" else root / f"HAM10000_images_part_{number % 2 + 1}"
        picture(place / f"{image}.jpg", 60 * number, (96, 96) if form == "copy" else (600, 450))
    text(root / ("HAM10000_metadata.csv" if form == "copy" else "HAM10000_metadata"), "lesion_id,image_id,dx,dx_type,age,sex,localization,dataset",
         *(f"{lesion},{image},{dx},histo,60.0,male,back,rosendahl" for image, lesion, dx in rows))
    if with_split:
        text(root / ("fed_isic2019_train_test_split.csv" if form == "copy" else "train_test_split"), "image,target,center,fold,fold2",
             "ISIC_0000001,0,3,train,train_3", "ISIC_0000002,0,3,test,test_3", "ISIC_0000003,1,3,test,test_3", "ISIC_0000004,7,3,train,train_3",
             "ISIC_0099999,1,0,train,train_0")


def isic(root):
    "ISIC 2019: two lesions of known origin, one picture of unknown origin."
    names = ["ISIC_0000001", "ISIC_0000002_downsampled", "ISIC_0000003", "ISIC_0000009"]
    for name in names:
        picture(root / "ISIC_2019_Training_Input" / f"{name}.jpg")
    text(root / "ISIC_2019_Training_GroundTruth.csv", "image,MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK", f"{names[0]},1,0,0,0,0,0,0,0,0", f"{names[1]},0,1,0,0,0,0,0,0,0",
         f"{names[2]},0,1,0,0,0,0,0,0,0", f"{names[3]},0,1,0,0,0,0,0,0,0")
    text(root / "ISIC_2019_Training_Metadata.csv", "image,age_approx,anatom_site_general,lesion_id,sex", f"{names[0]},50,back,BCN_0000001,male",
         f"{names[1]},50,back,MSK4_0000002,male", f"{names[2]},50,back,BCN_0000001,male", f"{names[3]},50,back,,male")


def ph2(root, form="copy"):
    "PH2: three rows of its printed table."
    rows = [("IMD003", 0), ("IMD009", 1), ("IMD435", 2)]
    for image, _ in rows:
        picture(root / ("images" if form == "copy" else f"PH2 Dataset images/{image}/{image}_Dermoscopic_Image") / f"{image}.{'jpg' if form == 'copy' else 'bmp'}")
        if form != "copy":
            picture(root / f"PH2 Dataset images/{image}/{image}_lesion/{image}_lesion.bmp", 255)
    text(root / "PH2_dataset.txt", "||   Name || Histological Diagnosis || Clinical Diagnosis || Asymmetry | Pigment Network | Dots/Globules | Streaks | "
         "Regression Areas | Blue-Whitish Veil ||           Colors ||",
         *(f"|| {image} ||         ||      {d} ||    {d} |    AT |    A |    A |    P |     P ||    3  4 ||" for image, d in rows), "", "Legends for Asymmetry:", "   0 - Fully Symmetric;")


def derm(root):
    "Derm7pt: three cases, one on each side."
    criteria = "pigment_network,streaks,pigmentation,regression_structures,dots_and_globules,blue_whitish_veil,vascular_structures"
    for name in ("NEL/NEL025.jpg", "NEL/NEL027.jpg", "FHL/Fhl014.jpg", "NEL/NEL026.jpg"):
        picture(root / "images" / name)
    text(root / "meta/meta.csv", f"case_num,diagnosis,seven_point_score,{criteria},sex,clinic,derm", "1,basal cell carcinoma,0,a,b,c,d,e,f,g,f,NEL/NEL026.jpg,NEL/NEL025.jpg",
         "2,clark nevus,0,a,b,c,d,e,f,g,f,x.jpg,NEL/Nel027.jpg", "3,melanoma (in situ),0,a,b,c,d,e,f,g,f,x.jpg,FHL/Fhl014.jpg")
    for name, index in (("train", 0), ("valid", 1), ("test", 2)):
        text(root / f"meta/{name}_indexes.csv", "indexes", str(index))


def chest(root):
    "ChestX-ray14: three pictures of two patients, with the official lists."
    head = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
    text(root / "Data_Entry_2017_v2020.csv", head, "00000061_012.png,Edema|Pneumonia,12,61,77,M,AP", "00000061_015.png,No Finding,15,61,77,M,PA",
         "00000150_002.png,Hernia,2,150,55,F,PA", "00000200_000.png,Mass,0,200,40,F,PA")
    for number, name in enumerate(("00000061_012", "00000061_015", "00000150_002")):
        picture(root / f"images_00{number + 1}/images/{name}.png", mode="L")
    text(root / "train_val_list.txt", "00000061_012.png", "00000061_015.png")
    text(root / "test_list.txt", "00000150_002.png")


def xray(root):
    "Chest X-rays of children: folders of the publisher beside a validation part as ViP's code calls it."
    for name in ("train/NORMAL/IM-0115-0001.jpeg", "train/PNEUMONIA/person1_bacteria_1.jpeg", "train/PNEUMONIA/person1_bacteria_2.jpeg",
                 "val/normal lung/NORMAL2-IM-0120-0001.jpeg", "test/PNEUMONIA/person1_virus_6.jpeg"):
        picture(root / name, mode="L")


def rsna(root, mapped=True):
    "RSNA Pneumonia: three pictures of two NIH patients."
    names = ["a1", "b2", "c3"]
    for name in names:
        dicom(root / f"stage_2_train_images/{name}.dcm", name, 100)
    text(root / "stage_2_train_labels.csv", "patientId,x,y,width,height,Target", *(f"{n},,,,,0" for n in names))
    text(root / "stage_2_detailed_class_info.csv", "patientId,class", "a1,Normal", "b2,Lung Opacity", "b2,Lung Opacity", "c3,No Lung Opacity / Not Normal")
    if mapped:
        text(root / "pneumonia-challenge-dataset-mappings_2018.json",
             json.dumps([{"subset_img_id": n, "img_id": f"0000{p}_000.png"} for n, p in zip(names, ("0061", "0061", "0150"))]))


def odir(root, form="copy"):
    "ODIR: two patients, three eyes; in the copy one eye stands twice."
    rows = ["['N']", "['D']", "['H']"]
    for number, name in enumerate(("0_left", "0_right", "7_left")):
        place = root / "images" if form == "copy" else root / "ODIR-5K/ODIR-5K/Training Images"
        picture(place / f"{name}{'_69_Female_' + 'NDH'[number] if form == 'copy' else ''}.jpg", number)
    if form == "copy":
        picture(root / "images/7_left_69_Female_DH.jpg", 2)
    flags = ["1,0,0,0,0,0,0,0", "1,0,0,0,0,0,0,0", "0,1,0,0,0,1,0,0"]
    text(root / "full_df.csv", "ID,Patient Age,Patient Sex,Left-Fundus,Right-Fundus,N,D,G,C,A,H,M,O,labels,filename",
         *(f"{n.split('_')[0]},69,Female,l,r,{f},{label},{n}.jpg" for n, f, label in zip(("0_left", "0_right", "7_left"), flags, rows)))


def head_ct(root):
    "Head CT: two slices, one with hemorrhage."
    text(root / "labels.csv", "id, hemorrhage", "0,1", "1,0")
    for number in range(2):
        picture(root / f"head_ct/head_ct/{number:03d}.png", mode="L")


def ich(root):
    "RSNA ICH: three slices of two patients, a doubled row."
    subtypes = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural", "any")
    rows = [f"ID_{image}_{s},{int(s in held or (s == 'any' and bool(held)))}" for image, held in (("a", ["epidural"]), ("b", ["epidural", "subdural"]), ("c", [])) for s in subtypes]
    text(root / "stage_2_train.csv", "ID,Label", *rows, rows[0])
    for image, patient in (("a", "Meier^Eva"), ("b", "Meier^Eva"), ("c", "Kim^Jo")):
        dicom(root / f"stage_2_train/ID_{image}.dcm", patient)


def brain(root):
    "Brain MR: three slices, two of them the same file."
    for name, shade in (("yes/Y1.jpg", 9), ("yes/Y2.JPG", 9), ("no/n1.jpg", 80)):
        picture(root / name, shade, mode="L")


def med_ad(root):
    "Med-AD: one of its sets."
    for name in "abcde":
        picture(root / f"LAG/images/{name}.png")
    text(root / "LAG/data.json", json.dumps({"train": {"0": ["a.png"], "unlabeled": {"0": ["b.png"], "1": ["c.png"]}}, "test": {"0": ["d.png"], "1": ["e.png"]}}))


def oral(root, form="copy"):
    "Oral histology at two magnifications."
    for name, side in (("Normal_100x_1", "train"), ("OSCC_100x_2", "test"), ("OSCC_400x_3", "train")):
        where = f"{side}/{name.split('_')[0]}" if form == "copy" else f"{'First' if '100x' in name else 'Second'} Set/{name.split('_')[1]} {name.split('_')[0]} Images"
        picture(root / where / f"{name}.jpg")


def nct(root, form="copy"):
    "NCT-CRC: two tissues."
    for name, kind in (("TUM-TCGA-A", "TUM"), ("ADI-TCGA-B", "ADI")):
        picture(root / (f"{kind}___{name}.jpg" if form == "copy" else f"{'NCT-CRC-HE-100K' if kind == 'TUM' else 'CRC-VAL-HE-7K'}/{kind}/{name}.tif"))


def lc(root, form="copy"):
    "LC25000: one class of each organ."
    for kind in ("colon_n", "lung_scc"):
        picture(root / (f"{kind}___x_1.jpg" if form == "copy" else f"{kind.split('_')[0]}_image_sets/{kind}/{kind}1.jpeg"))


def breakhis(root, form="copy"):
    "BreakHis: three pictures of two patients."
    for name in ("SOB_B_A-14-22549AB-400-007", "SOB_B_A-14-22549AB-100-001", "SOB_M_DC-14-2523-400-010"):
        kind = "benign" if "_B_" in name else "malignant"
        picture(root / (f"{kind}___{name}_1.jpg" if form == "copy" else f"histology_slides/breast/{kind}/SOB/x/{name.rsplit('-', 2)[0]}/400X/{name}.png"))


def bone(root):
    "Osteosarcoma: three patches of two cases."
    for name in ("Non-Tumor___Case-3-A15-2939-11262_112", "Viable___Case-48-P5-C-1", "Non-Viable-Tumor___Case-3-A17-1-2"):
        picture(root / f"{name}.jpg")


def gastric(root):
    "Gastric: two of three categories."
    for number in (0, 2):
        picture(root / f"category_{number}___a_{number}.jpg")


def nuclei(root, form="copy"):
    "One nuclei picture with two instances."
    boxes = [(0, 0, 3, 2), (4, 3, 6, 6)]
    picture(root / ("images/x.jpg" if form == "copy" else "stage1_train/x/images/x.png"), size=(8, 6))
    whole = np.zeros((6, 8), np.uint16)
    for number, (left, top, right, bottom) in enumerate(boxes, 1):
        one = Image.new("L", (8, 6))
        one.paste(255, (left, top, right, bottom))
        whole[top:bottom, left:right] = number
        if form != "copy":
            (root / "stage1_train/x/masks").mkdir(parents=True, exist_ok=True)
            one.save(root / f"stage1_train/x/masks/{number}.png")
    if form == "copy":
        (root / "labels").mkdir()
        Image.fromarray(whole).save(root / "labels/x.png")


def pancreas(root):
    "NIH Pancreas: two slices of one patient and a label."
    for number in range(3):
        path = root / f"PANCREAS_0001/study/series/{number}.dcm"
        dicom(path, "one")
        data = pydicom.dcmread(path)
        data.InstanceNumber, data.ImagePositionPatient = number + 1, [0, 0, 5.0 * number]
        data.save_as(path)
    mask = np.zeros((8, 8, 3), np.uint8)
    mask[2:4, 2:4] = 1
    path = root / "labels/label0001.nii.gz"
    path.parent.mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(mask, np.diag([-1.0, -1.0, 5.0, 1.0])), path)


def official_slices(root):
    "LTUDA's slices: one training slice of a spleen case, one test volume."
    for name, shape in (("slice_npz/Organ12_40_7", (8, 6, 1)), ("npz_case/case_11", (8, 6, 3))):
        hu, organs = np.full(shape, -900, np.int16), np.zeros(shape, np.uint8)
        hu[1:4, 1:3], organs[1:4, 1:3] = 60, 2
        (root / "AbdomenCT-1K" / name).parent.mkdir(parents=True, exist_ok=True)
        np.savez(root / f"AbdomenCT-1K/{name}.npz", hu, organs)


def medmnist(root):
    "PneumoniaMNIST with two pictures a side."
    root.mkdir(parents=True)
    arrays = {f"{s}_{w}": np.zeros((2, 8, 8) if w == "images" else (2, 1), np.uint8) for s in ("train", "val", "test") for w in ("images", "labels")}
    arrays["test_labels"][1] = 1
    np.savez_compressed(root / "pneumoniamnist.npz", **arrays)


def modelnet(root):
    "Two meshes of one class."
    for side in ("train", "test"):
        text(root / f"chair/{side}/chair_0001.off", "OFF", "4 4 0", "0 0 0", "1 0 0", "0 1 0", "0 0 1", "3 0 1 2", "3 0 1 3", "3 0 2 3", "3 1 2 3")


def voxels(root):
    "Three shapes of two classes as bits."
    root.mkdir(parents=True)
    for name, n in (("chair", 2), ("monitor", 1)):
        cubes = np.random.default_rng(n).random((n, 32, 32, 32)) > 0.5
        np.savez(root / f"{name}.npz", voxels=np.packbits(cubes.reshape(n, -1), axis=1), shape=np.array(cubes.shape))


def wiki(root):
    "WikiText: one article a side."
    for name in ("train", "valid", "test"):
        text(root / f"{name}.txt", " ", f" = A <unk> {name} = ", " ", " A sentence . ", " ", " = = Part = = ", " ", " Another . ")


TINY = {  # name: (builder, folder, what it must hold: examples, groups, labels)
    "ham10000": (ham, "ham10000", 4, 3, [0, 0, 1, 7]),
    "isic2019": (isic, "ISIC_2019", 3, 2, [0, 1, 1]),
    "ph2": (ph2, "PH2Dataset", 3, 0, [0, 1, 2]),
    "derm7pt": (derm, "release_v0", 3, 3, [0, 1, 2]),
    "nih-chestxray14": (chest, "nih_chestxray14", 3, 2, None),
    "rsna-pneumonia": (rsna, "rsna_pneumonia", 3, 2, [0, 2, 1]),
    "pneumonia-xray": (xray, "chest_xray", 5, 4, [0, 1, 1, 0, 1]),
    "odir5k": (odir, "odir5k", 3, 2, [0, 1, 5]),
    "head-ct": (head_ct, "head_ct", 2, 0, [1, 0]),
    "rsna-ich": (ich, "rsna_ich", 3, 2, None),
    "brain-mri": (brain, "brain_mri", 3, 2, [0, 1, 1]),
    "med-ad": (med_ad, "Med-AD", 5, 0, [0, 0, 1, 0, 1]),
    "oral-histology": (oral, "oral_histology", 3, 0, None),
    "nct-crc": (nct, "histology_probes/nct_crc", 2, 0, [0, 8]),
    "lc25000": (lc, "histology_probes/lc25000", 2, 0, [1, 4]),
    "breakhis": (breakhis, "histology_probes/breakhis", 3, 2, [0, 0, 1]),
    "osteosarcoma": (bone, "histology_probes/osteosarcoma", 3, 2, [0, 1, 2]),
    "gastric": (gastric, "histology_probes/gastric", 2, 0, [0, 2]),
    "dsb2018": (nuclei, "dsb2018", 1, 0, [0]),
    "lits": (lambda r: organ_case(r / "volume-3.nii", r / "segmentation-3.nii", 2), "LiTS", 1, 1, [0]),
    "msd": (lambda r: organ_case(r / "Task09_Spleen/imagesTr/s_1.nii.gz", r / "Task09_Spleen/labelsTr/s_1.nii.gz", 1), "msd", 1, 1, [0]),
    "kits19": (lambda r: organ_case(r / "data/case_00001/imaging.nii.gz", r / "data/case_00001/segmentation.nii.gz", 1), "kits19", 1, 1, [0]),
    "nih-pancreas": (pancreas, "Pancreas-CT", 1, 1, [0]),
    "abdomenct-1k": (lambda r: organ_case(r / "a/Case_00001_0000.nii.gz", r / "Mask/Case_00001.nii.gz", 3), "AbdomenCT-1K", 1, 1, [0]),
    "ltuda-slices": (official_slices, "Toy_dataset", 2, 2, [0, 0]),
    "medmnist": (medmnist, "pneumoniamnist", 6, 0, [0, 0, 0, 0, 0, 1]),
    "modelnet": (modelnet, "ModelNet10", 2, 0, [0, 0]),
    "modelnet-voxels": (voxels, "modelnet_voxels", 3, 0, [0, 0, 1]),
    "wikitext-2": (wiki, "wikitext-2", 3, 0, [0, 0, 0]),
}
OTHER_FORMS = {"ham10000": ham, "ph2": ph2, "odir5k": odir, "oral-histology": oral, "nct-crc": nct, "lc25000": lc, "breakhis": breakhis, "dsb2018": nuclei}
ORGAN = {"lits": 1, "msd": 2, "kits19": 3, "nih-pancreas": 4, "abdomenct-1k": 2, "ltuda-slices": 2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "Nothing of a test reaches the user's cache or data."
    monkeypatch.setenv("HKUST_DEMOS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)


def opened(name, tmp_path):
    "The tiny tree of a set, opened."
    builder, folder, *_ = TINY[name]
    builder(tmp_path / "sets" / folder)
    return open_collection(name, tmp_path / "sets")


def test_the_register_covers_every_set_and_names_methods_that_exist():
    assert TINY.keys() == COLLECTIONS.keys()
    assert {m for record in COLLECTIONS.values() for m in record.methods} <= METHODS.keys()


@pytest.mark.parametrize("name", COLLECTIONS)
def test_every_reader_reads_a_tiny_tree(name, tmp_path):
    found, (_, _, n, n_groups, labels) = opened(name, tmp_path), TINY[name]
    assert len(found) == n and len({g for g in found.groups if g}) == n_groups and len(set(found.keys)) == n
    assert labels is None or found.labels.tolist() == labels
    assert decode_all(found) == [] and describe(found) and found.version().startswith(f"{n} ")
    if found.kind == "pictures":
        assert found.picture(0, 8).shape == (8, 8, 3) and found.picture(n - 1, 8, color=False).dtype == np.uint8


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_the_publisher_s_form_gives_the_same_examples_as_the_copy(name, tmp_path):
    copy = opened(name, tmp_path)
    folder = tmp_path / "published" / COLLECTIONS[name].folders[0]
    OTHER_FORMS[name](folder, form="published")
    published = open_collection(name, tmp_path / "published")
    order = lambda s: sorted(zip(map(str, s.labels.tolist()), map(str, s.groups), map(str, s.sites)))  # noqa: E731
    assert order(copy) == order(published) and copy.classes == published.classes and decode_all(published) == []
    if name == "dsb2018":
        assert (copy.mask(0) == published.mask(0)).all() and copy.mask(0, 4).max() == 2
    if name == "ham10000":
        assert published.picture(1, 32).shape == copy.picture(1, 32).shape
        assert abs(int(published.picture(1, 32)[9, 9, 0]) - int(copy.picture(1, 32)[9, 9, 0])) <= 2


def test_ham_without_the_split_keeps_its_seven_words(tmp_path):
    ham(tmp_path / "HAM10000", form="published", with_split=False)
    found = open_collection("ham10000", tmp_path)
    assert found.labels.tolist() == [0, 0, 1, 3] and not any(found.official)
    with pytest.raises(CollectionError, match="no official split"):
        found.official_split()


def test_the_official_leak_is_counted_and_the_clean_test_is_clean(tmp_path):
    found = opened("ham10000", tmp_path)
    official, clean = found.official_split(), found.official_split(clean=True)
    assert official.test.tolist() == [1, 2] and official.leaked.tolist() == [1] and "1 of 2 test pictures share a lesion" in official.note
    assert clean.test.tolist() == [2] and clean.train.tolist() == official.train.tolist() and not len(clean.leaked)
    assert "official split without leak" in " ".join(describe(found))


def test_a_leak_of_one_s_own_is_refused(tmp_path):
    found = opened("nih-chestxray14", tmp_path)
    with pytest.raises(LeakError, match="1 of 1 held-out pictures belong to a patient"):
        found.own_split([0], [1])
    with pytest.raises(LeakError):
        found.own_split([2], [2])
    with pytest.raises(LeakError):
        found.own_split([2], [], val=[2])
    assert found.own_split([0, 1], [2]).test.tolist() == [2]


@pytest.mark.parametrize("name", ["ham10000", "nih-chestxray14", "odir5k", "breakhis", "rsna-ich", "brain-mri"])
def test_no_group_stands_on_both_sides(name, tmp_path):
    found = opened(name, tmp_path)
    for split in [found.split(0.5, seed) for seed in range(5)] + found.folds(2):
        assert not set(found.groups[split.train]) & set(found.groups[split.test]) and len(split.train) + len(split.test) == len(found)
        assert COLLECTIONS[name].group in split.note


def test_a_set_without_patients_says_so_with_every_split(tmp_path):
    assert "names no patients" in opened("oral-histology", tmp_path).split(0.5).note
    assert any("no split is clean" in line for line in describe(opened("lc25000", tmp_path)))


@pytest.mark.parametrize("name", ORGAN)
def test_organs_have_one_numbering(name, tmp_path):
    case = opened(name, tmp_path).read(0)
    assert np.unique(case.organs).tolist() == [0, ORGAN[name]] and case.organs.shape == case.scan.array.shape
    assert (case.scan.array[case.organs > 0] > -50).all()


def test_a_label_of_another_scan_is_refused(tmp_path):
    organ_case(tmp_path / "lits/volume-1.nii", tmp_path / "lits/segmentation-1.nii", 1)
    volume(tmp_path / "lits/segmentation-1.nii", np.ones((8, 6, 3), np.uint8))
    assert "do not belong together" in decode_all(open_collection("lits", tmp_path))[0]
    volume(tmp_path / "lits/segmentation-1.nii", np.full((8, 6, 3), 9, np.uint8))
    assert "holds the label 9" in decode_all(open_collection("lits", tmp_path))[0]


def test_patients_of_dicom_headers_are_hashed_and_cached(tmp_path):
    found = opened("rsna-ich", tmp_path)
    first, second, third = found.groups
    assert first == second != third and len(first) == 16
    kept = list((tmp_path / "cache").glob("patients-*.json"))
    assert len(kept) == 1 and "Meier" not in kept[0].read_text() and "Meier" not in " ".join(describe(found))


def test_rsna_without_its_mapping_says_that_patients_are_unknown(tmp_path):
    rsna(tmp_path / "rsna_pneumonia", mapped=False)
    found = open_collection("rsna-pneumonia", tmp_path)
    assert not any(found.groups) and any("mapping" in note for note in found.notes)


def test_nuclei_sites_are_looks(tmp_path):
    picture(tmp_path / "dsb2018/images/b.png", 220, (8, 6))
    picture(tmp_path / "dsb2018/images/a.png", 10, (8, 6))
    Image.new("RGB", (8, 6), (200, 120, 190)).save(tmp_path / "dsb2018/images/c.png")
    for name in "abc":
        picture(tmp_path / f"dsb2018/labels/{name}.png", 1, (8, 6), mode="L")
    assert open_collection("dsb2018", tmp_path).sites.tolist() == ["fluorescence", "bright gray", "stained"]


def test_an_eye_that_stands_twice_counts_once(tmp_path):
    found = opened("odir5k", tmp_path)
    assert any("4 pictures are here; 1 of them" in note for note in found.notes)
    assert found.columns["patient_labels"][2].tolist() == [False, True, False, False, False, True, False, False]


def claimed_png(path, width, height):
    "A PNG header that claims a size, and nothing behind it."
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + chunk(b"IEND", b""))


def test_hostile_and_damaged_pictures_are_refused_by_name(tmp_path):
    claimed_png(tmp_path / "huge.png", 20_000, 20_000)
    with pytest.raises(CollectionError, match="huge.png"):
        open_picture(tmp_path / "huge.png")
    picture(tmp_path / "cut.jpg", size=(200, 200))
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:300])
    with pytest.raises(CollectionError, match="cut.jpg cannot be read"):
        open_picture(tmp_path / "cut.jpg")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.gif")
    with pytest.raises(CollectionError, match="PNG, JPEG, TIFF or BMP"):
        open_picture(tmp_path / "x.gif")


def test_sixteen_bits_keep_their_order(tmp_path):
    ramp = np.arange(0, 4096, 64, dtype=np.uint16).reshape(8, 8)
    picture(tmp_path / "head_ct/head_ct/001.png", mode="L")
    text(tmp_path / "head_ct/labels.csv", "id,hemorrhage", "0,1", "1,0")
    Image.fromarray(ramp).save(tmp_path / "head_ct/head_ct/000.png")
    seen = open_collection("head-ct", tmp_path).picture(0, 8, color=False)
    assert (np.diff(seen.ravel().astype(int)) >= 0).all() and seen.max() > 240


def test_a_table_that_names_a_file_outside_finds_nothing(tmp_path):
    chest(tmp_path / "nih_chestxray14")
    picture(tmp_path / "secret.png")
    table = tmp_path / "nih_chestxray14/Data_Entry_2017_v2020.csv"
    table.write_text(table.read_text() + "../../secret.png,Mass,0,9,40,F,PA\n")
    found = open_collection("nih-chestxray14", tmp_path)
    assert len(found) == 3 and any("2 rows of the table have no file here" in note for note in found.notes)


@pytest.mark.parametrize("change, sentence", [
    (lambda s: s.replace("dx,", "diagnosis,"), "has no column 'dx'"),
    (lambda s: s.replace(",mel,", ",wart,"), "holds the label 'wart'"),
    (lambda s: s.replace("ISIC_0000002", "ISIC_0000001"), "twice"),
    (lambda s: "", "no readable CSV"),
])
def test_a_wrong_table_is_refused_by_name(change, sentence, tmp_path):
    ham(tmp_path / "ham10000")
    table = tmp_path / "ham10000/HAM10000_metadata.csv"
    table.write_text(change(table.read_text()))
    with pytest.raises(CollectionError, match=sentence):
        open_collection("ham10000", tmp_path)


def test_pickled_arrays_are_never_opened(tmp_path):
    voxels(tmp_path / "modelnet_voxels")
    np.savez(tmp_path / "modelnet_voxels/evil.npz", voxels=np.array([{}], object), shape=np.array([1, 32, 32, 32]))
    with pytest.raises(CollectionError, match="pickled objects"):
        open_collection("modelnet-voxels", tmp_path)


@pytest.mark.parametrize("name", COLLECTIONS)
def test_a_missing_set_says_where_to_get_it(name, tmp_path):
    record = COLLECTIONS[name]
    with pytest.raises(CollectionMissing) as refusal:
        find_collection(name, tmp_path)
    assert str(refusal.value) == missing_sentence(record) and record.page in str(refusal.value) and record.layout in str(refusal.value)


def test_an_empty_folder_of_the_right_name_is_not_the_set(tmp_path):
    (tmp_path / "ham10000").mkdir()
    with pytest.raises(CollectionMissing):
        find_collection("ham10000", tmp_path)


def test_a_set_with_parts_is_chosen_by_part(tmp_path):
    medmnist(tmp_path / "medmnist")
    (tmp_path / "medmnist/pathmnist.npz").write_bytes((tmp_path / "medmnist/pneumoniamnist.npz").read_bytes())
    with pytest.raises(ValueError, match="choose one, such as medmnist/pathmnist"):
        open_collection("medmnist", tmp_path)
    assert open_collection("medmnist/pneumoniamnist", tmp_path).classes == ("normal", "pneumonia")
    with pytest.raises(CollectionMissing, match="no part 'x' of it; its parts here are pathmnist, pneumoniamnist"):
        open_collection("medmnist/x", tmp_path)


def test_data_check_counts_and_ends_with_an_error_where_a_picture_is_cut(tmp_path, monkeypatch, capsys):
    ham(tmp_path / "ham10000")
    brain(tmp_path / "brain_mri")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert cli.main(["data", "check"]) == 0
    shown = capsys.readouterr().out
    assert "4 pictures of 3 lesions" in shown and "all 4 read" in shown and f"sets here: 2, missing: {len(COLLECTIONS) - 2}" in shown
    (tmp_path / "ham10000/images/ISIC_0000002.jpg").write_bytes(b"\xff\xd8\xff cut")
    assert cli.main(["data", "check", "ham10000"]) == 2
    both = capsys.readouterr()
    assert "1 cannot be read, such as ISIC_0000002" in both.out and "sets that cannot be read in full: 1 of 1" in both.err


def test_without_the_variable_check_prints_where_to_get_each(capsys):
    assert cli.main(["data", "check"]) == 0
    shown = capsys.readouterr().out
    assert all(record.page in shown for record in COLLECTIONS.values()) and VARIABLE in shown
    assert cli.main(["data", "list"]) == 0 and cli.main(["data", "list", "ham10000"]) == 0
    assert "CC BY-NC-SA 4.0" in capsys.readouterr().out
    assert cli.main(["data", "check", "ph2"]) == 2 and "named, but not here: 1" in capsys.readouterr().err
    assert cli.main(["data", "list", "cifar"]) == 2 and cli.main(["data", "check", "cifar"]) == 2


def test_the_register_and_its_list_load_nothing_heavy():
    program = "import sys; from hkust_demos.cli import main; main(['data', 'list']); print([m for m in ('torch', 'pandas', 'numpy', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_page_in_the_docs_is_the_register(root):
    from hkust_demos.data.archives import archive_table
    from hkust_demos.data.collections import markdown_layouts, markdown_table
    for notebook, made in (("06_collections", [markdown_table(), markdown_layouts()]), ("13_archives", [archive_table()])):
        cells = json.loads((root / f"nbs/data/{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
        shown = ["".join(output["data"].get("text/markdown", "")) for cell in cells for output in cell.get("outputs", []) if "data" in output]
        assert [page for page in shown if page] == made


@pytest.mark.parametrize("name, builder", [("derm7pt", derm), ("breakhis", lambda r: breakhis(r, "published")), ("ham10000", ham)])
def test_an_archive_unpacked_into_its_own_folder_is_found(name, builder, tmp_path):
    builder(tmp_path / COLLECTIONS[name].folders[0] / "unpacked_here")
    assert len(open_collection(name, tmp_path)) == TINY[name][2]


def test_ham_of_dataverse_with_tabs_and_small_letters(tmp_path):
    ham(tmp_path / "ham10000", form="published")
    table = tmp_path / "ham10000/HAM10000_metadata"
    table.with_suffix(".tab").write_text(table.read_text().replace(",", "\t"))
    table.unlink()
    for number in (1, 2):
        (tmp_path / f"ham10000/HAM10000_images_part_{number}").rename(tmp_path / f"ham10000/ham10000_images_part_{number}")
    assert open_collection("ham10000", tmp_path).labels.tolist() == [0, 0, 1, 7]


def test_a_link_to_a_folder_of_sets_is_followed_and_a_home_is_understood(tmp_path, monkeypatch, capsys):
    brain(tmp_path / "disk/brain_mri")
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "~/link/")
    assert len(open_collection("Brain_MRI")) == 3
    monkeypatch.setenv(VARIABLE, str(tmp_path / "disk/brain_mri/yes/Y1.jpg"))
    assert cli.main(["data", "check"]) == 2 and "which is no folder" in capsys.readouterr().err
