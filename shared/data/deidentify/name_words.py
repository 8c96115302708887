"""Word lists of `shared.data.deidentify.names`: plain data, in small letters."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Given names that are hardly anything else. Those that are words too (Grace, Mark, Will) need a title or cue.
GIVEN_NAMES = _words("""
    aaron abby abdul abigail ada adam adele adrian adriana agatha agnes ahmed aidan aisha alain alan albert
    alejandro aleksander alessandro alex alexander alexandra alexis alfred ali alice alicia alison alistair alma
    alvin amanda amelia amina amir amy ana anastasia anders andre andrea andrew andrzej angela angus anil anita anja
    ann anna anne annette annie anouk anthony antoine anton antonio anya arash arjun armando arnold arthur arturo
    ashley astrid audrey axel ayesha barbara bashir beatrice bella ben benedict benjamin bernadette bernard bert
    beth betty beverly bjorn bob bobby boris brad bradley brandon brenda brent brett brian bridget bruce bryan
    caitlin calvin cameron camila candice carl carla carlos carmen carol caroline catherine cathy cecilia cedric
    charles charlotte cheryl chiara chloe christian christina christine christopher claire clara clarence claude
    claudia clement clifford clive colin connor conor corinne courtney craig curtis cynthia cyril dale damian dana
    daniel danielle daphne darren dave david debbie deborah debra declan deepak delia denise dennis derek desmond
    diana diane diego dimitri dimitrios dina dirk dmitri dolores dominic donald donna dora doris dorothy douglas
    duncan dwight dylan eamonn eddie edgar edith edna edward edwin eileen elaine eleanor elena elias elise eliza
    elizabeth ella ellen elliot elliott elsa elsie emil emilio emily emma emmanuel enrique eric erica erik erin
    ernest ernesto esther ethan ethel eugene eugenia eva evelyn fabio faisal farah fatima felicity felix fergus
    fernando finn fiona florence florian frances francesca francis francisco francois franz fred freddie frederick
    freya gabriel gabriela gail gareth gary gavin gemma genevieve geoffrey george georgia georgina gerald gerard
    gilbert gillian gina giorgio giovanni giulia glenda glenn gloria gordon graham greg gregory greta guillermo
    gunnar gustavo gwen hamid hamza hannah hans harold harriet harry harvey hassan hazel heather hector heidi heinz
    helen helena henrik henry herbert herman hilary hiroshi holly horace howard hubert huda hugh hussein ian ibrahim
    ignacio igor imran ines ingrid irene isaac isabel isabella isha ismail ivan ivy jacek jack jacob jacqueline
    jacques jaime jake james jamie jane janet janice janine jared jasmine jason jasper javier jayne jean jeff
    jeffery jeffrey jenna jennifer jenny jens jeremy jerome jerry jessica jill jim jimmy joan joanna joanne joaquin
    jocelyn jodie joe joel johan johannes john johnny jonas jonathan jordan jorge jose joseph josephine josh joshua
    joyce juan judith julia julian julie juliet juliette jurgen justin kamal karen karim karin karina karl kasper
    katarina kate katerina katherine kathleen kathryn kathy katie katrina keiko keith kelly ken kenji kenneth kenny
    kevin khalid kieran kim kimberly kirsten kirsty klara klaus krishna krzysztof kumar kwame kyle lakshmi larry
    lars laura lauren lawrence leah leila lena lenny leo leon leonard leonardo leroy leslie lewis liam lillian linda
    lisa liz lloyd lois lola lorenzo loretta lorna lorraine lou louis louisa louise luca lucas lucia lucie lucy
    luigi luis luke lydia lynn lynne mabel maddie madeleine magdalena maisie malcolm malik mandy manish manuel marc
    marcel marcia marcin marco marcos marcus margaret margot maria mariam mariana marie marilyn marina mario marion
    marjorie markus marlene marta martha martin martina marvin mary marybeth mateo mats matt matteo matthew matthias
    maureen maurice mauricio max maxwell megan mehmet melanie melinda melissa mercedes meredith michael michelle
    mick miguel mike mikhail milan mildred millie milos mindy miriam mitchell mohamed mohammad mohammed moira mona
    monica morgan moses muhammad mustafa myra nadia nadine nancy naomi nasser natalia natalie natasha nathalie
    nathan nathaniel ned neil nellie nelson niall niamh nicholas nick nico nicola nicole nigel nikhil nikita nikolai
    nils nina noah nora norma norman nuria oleg olga oliver olivia omar orla oscar oskar otto owen pablo paige
    pamela paolo pascal patricia patrick paul paula paulina pauline pavel pedro peggy penelope perry peter petra
    phil philip philippa phoebe phyllis pierre pilar pradeep preeti priya quentin rachel rafael rafal rahul raj
    rajesh ralf ralph ramesh ramon randy raquel rasheed rashid raul ravi raymond rebecca reginald reza rhonda rhys
    ricardo richard ricky rita rob robbie robert roberta roberto robin rochelle roderick rodney rogelio roger rohan
    roland roman ron ronald rosa rosalind rosemary rosie ross rowena roy ruben rudolf rupert russell ruth ryan
    sabrina sadie sally salma salvador sam samantha sami samir samuel sana sandeep sandra sanjay sanjeev santiago
    sara sarah sasha satoshi saul scott sean sebastian selina serena sergei sergio seth shannon sharon shaun shawn
    sheila sheryl shirin shirley sian sidney sigrid silvia simon simone siobhan sofia sonia sonya sophia sophie
    soren spike stacey stacy stan stanley stefan steffen stella stephanie stephen steve steven stewart stuart sue
    sunil suresh susan susanna susannah suzanne sven svetlana sylvia tahir takashi tamara tanya tariq tatiana ted
    terence teresa terrence terri terry tessa thabo thelma theo theodore theresa thierry thomas tiffany tim timothy
    tina tobias todd tom tomas tomasz toni tony tracey tracy travis trevor trisha tyler ursula uwe valentina valerie
    vanessa vera vernon veronica vic vicky victor victoria vijay vikram vince vincent viola virgil virginia vivek
    vivian vladimir walid wallace walter wanda wayne wendy wilfred wilhelm william willie wilma winifred winston
    wojciech wolfgang xavier yann yasmin yolanda yosef yuki yuri yusuf yvette yvonne zachary zainab zara zeynep zoe
    zofia
""")

# Words that stand where a name could and are none; a name ends before them.
NO_NAMES = _words("""
    a a&e about accident account accounts admits admitted advocate after age aged agreement agrees aids all alone
    also although alzheimer american an and any appears apr april are arrived as asian asked asks assessment
    assistance association at attended aug august avenue bank banking became before began being black board both bp
    british but by cad called calls came can cardiologist care case catholic cbc center centre chf chief chinese ckd
    client clinic clinical college committee company complained complains complaint consent consented consultant
    controlled coordinator copd could council credit crohn ct current currently customer customers data date day
    debit dec december declined denied denies dentist department details diagnosis did director discharged discussed
    dnr dob doctor does during dvt each east ecg ed education ekg email emergency er every examination experience
    facing family feb february feels fell female follow following for french friday from further gave general german
    given goes government gp group had has have having he health her here his history hiv hodgkin home hospital
    however hr icd icu id identification if im in inc indian information insurance intensive into is it its iv ivf
    jan january jul july jun june lane later left limited lives loan loans ltd male man management manager mar march
    may md med medical medications medicine met mi midwife monday more mortgage mr mri mrs ms nad name neurologist
    new nhs nkda no none north not note nov november now number nurse oct october of office officer on oncologist
    opd or other our outpatient pain parkinson past patient patients payment payments pe pharmacist phone physician
    plan please po portal post practice practitioner presented presents previous prior prn problem progress
    psychiatrist pt pt's ptsd radiologist record records refused registrar relations remains reported reports
    representative requires responded returned returns road rr safety said saint satisfaction saturday savings saw
    says see seen self sep sept september service services she should since so some south spanish st stat stated
    states status still street sunday support surgeon surgery surgical symptoms team tel telephone thank thanks that
    the their then therapist there these they this those thursday to today tolerated took transport treatment
    tuesday understands unit university unknown until up us uti verbalised verbalized visit vital ward was we
    wednesday week went were west what when where which while white who whose will with would yes yesterday you your
""")

# The same behind "mr", "ms" and the like where nothing is written in capitals.
SMALL_NO_NAMES = NO_NAMES | _words("""
    right darcy-like perfect big good bad old new nice hot fix it all very so really
""")
